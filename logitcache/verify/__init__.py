"""Does the cache fit the data, is it what was written, and how is it made good again?"""
