"""Commands, stages, servers, browsers and processes together."""
