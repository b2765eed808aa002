"""The command line: parse, call, print."""

# isort: skip_file: `--help` lists commands in the order in which they come in.
from logitcache.cli import caches as caches
from logitcache.cli import stages as stages
from logitcache.cli.application import app as app
from logitcache.cli.application import main as main
