"""`python -m logitcache`."""

from logitcache.cli import main

if __name__ == "__main__":
    main()
