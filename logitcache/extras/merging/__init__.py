"""Several teachers over the same views: their labels as one, in a cache of their own or live."""
