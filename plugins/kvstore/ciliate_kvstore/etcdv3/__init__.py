"""The public etcd v3 protocol: calls over grpc.aio, watches over HTTP/2 of our own."""
