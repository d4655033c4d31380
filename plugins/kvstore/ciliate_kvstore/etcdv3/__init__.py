"""The public etcd v3 protocol over grpc.aio."""
