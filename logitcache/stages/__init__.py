"""The stages of a pipeline: train the teacher, build the cache, train students, or all of them."""
