"""The policy engine: rules in, map state out. Pure functions over plain data; knows no kernel."""
