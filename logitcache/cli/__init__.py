"""The command line: parse, call, print."""

# ruff: noqa: I001
# `--help` lists commands in the order of these imports.
from logitcache.cli import init as init
from logitcache.cli import caches as caches
from logitcache.cli import stages as stages
from logitcache.extras import commands as commands
from logitcache.cli.application import app as app
from logitcache.cli.application import main as main
