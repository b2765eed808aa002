"""`python -m logitcache.cli`."""

from logitcache.cli import main

main()
