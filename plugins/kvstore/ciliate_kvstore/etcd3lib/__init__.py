"""The library `cslab-etcd3` as the way to the members, in place of grpc.aio."""
