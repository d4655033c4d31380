"""The lab: a test cluster on one machine. Nodes, pods and the world outside are network namespaces; agents, CNI calls
and packets are real."""
