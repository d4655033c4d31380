"""The nodes of the cluster: who they are, how this one makes itself known, and what it knows of the others."""

from ciliate.node.model import Node
from ciliate.node.peers import NodeDatapath, Peers
from ciliate.node.registry import NodeRegistry

__all__ = ["Node", "NodeDatapath", "NodeRegistry", "Peers"]
