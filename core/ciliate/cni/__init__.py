"""The Container Network Interface: requests and results by the specification, the server, the chaining modes."""
