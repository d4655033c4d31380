"""The protocol's messages, made from `rpc.proto` when this module is imported (about a millisecond).

Generated code would tie us to one release of protobuf; a descriptor works with every one since 4.22. The reader below
knows what `rpc.proto` uses of the language: messages, enumerations, ``oneof``, ``repeated``, five scalar types.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "ciliate.etcdv3"
_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bytes": _FIELD.TYPE_BYTES,
    "string": _FIELD.TYPE_STRING,
    "int64": _FIELD.TYPE_INT64,
    "uint64": _FIELD.TYPE_UINT64,
    "bool": _FIELD.TYPE_BOOL,
}
_TOKEN = re.compile(r"//[^\n]*|\s+|(\"[^\"]*\"|[\w.]+|[{}=;])")


def read_proto(text: str, name: str) -> Any:
    """The FileDescriptorProto of a file in the part of the language that `rpc.proto` uses. ValueError elsewhere."""
    tokens = (match.group(1) for match in _TOKEN.finditer(text) if match.group(1))
    file = descriptor_pb2.FileDescriptorProto(name=name)
    for word in tokens:
        if word == "syntax":
            _expect(tokens, "=")
            file.syntax = next(tokens).strip('"')
            _expect(tokens, ";")
        elif word == "package":
            file.package = next(tokens)
            _expect(tokens, ";")
        elif word == "message":
            _message(tokens, file.message_type.add(name=next(tokens)), file.package)
        else:
            raise ValueError(f"{name}: {word!r} found, expected syntax, package or message")
    return file


def _expect(tokens: Iterator[str], *choices: str) -> str:
    word = next(tokens)
    if word not in choices:
        raise ValueError(f"{word!r} found, expected {' or '.join(choices)}")
    return word


def _message(tokens: Iterator[str], message: Any, package: str) -> None:
    _expect(tokens, "{")
    enums: set[str] = set()
    for word in tokens:
        if word == "}":
            return
        if word == "enum":
            enums.add(_enum(tokens, message))
        elif word == "oneof":
            _oneof(tokens, message, package, enums)
        else:
            _field(tokens, word, message, package, enums)


def _enum(tokens: Iterator[str], message: Any) -> str:
    enum = message.enum_type.add(name=next(tokens))
    _expect(tokens, "{")
    while (word := next(tokens)) != "}":
        _expect(tokens, "=")
        enum.value.add(name=word, number=int(next(tokens)))
        _expect(tokens, ";")
    return str(enum.name)


def _oneof(tokens: Iterator[str], message: Any, package: str, enums: set[str]) -> None:
    index = len(message.oneof_decl)
    message.oneof_decl.add(name=next(tokens))
    _expect(tokens, "{")
    while (word := next(tokens)) != "}":
        _field(tokens, word, message, package, enums).oneof_index = index


def _field(tokens: Iterator[str], word: str, message: Any, package: str, enums: set[str]) -> Any:
    repeated = word == "repeated"
    kind = next(tokens) if repeated else word
    field = message.field.add(name=next(tokens), label=_FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL)
    _expect(tokens, "=")
    field.number = int(next(tokens))
    _expect(tokens, ";")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    elif kind in enums:
        field.type, field.type_name = _FIELD.TYPE_ENUM, f".{package}.{message.name}.{kind}"
    else:
        field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{package}.{kind}"
    return field


_FILE = read_proto(files(__package__).joinpath("rpc.proto").read_text(), "ciliate_kvstore/etcdv3/rpc.proto")
_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(_FILE)
DESCRIPTORS: dict[str, Any] = {
    item.name: _POOL.FindMessageTypeByName(f"{PACKAGE}.{item.name}") for item in _FILE.message_type
}


def _class(name: str) -> Any:
    return message_factory.GetMessageClass(DESCRIPTORS[name])


KeyValue = _class("KeyValue")
RangeRequest, RangeResponse = _class("RangeRequest"), _class("RangeResponse")
PutRequest, PutResponse = _class("PutRequest"), _class("PutResponse")
DeleteRangeRequest, DeleteRangeResponse = _class("DeleteRangeRequest"), _class("DeleteRangeResponse")
RequestOp, Compare = _class("RequestOp"), _class("Compare")
TxnRequest, TxnResponse = _class("TxnRequest"), _class("TxnResponse")
CompactionRequest, CompactionResponse = _class("CompactionRequest"), _class("CompactionResponse")
WatchRequest, WatchCreateRequest, WatchResponse = (
    _class("WatchRequest"),
    _class("WatchCreateRequest"),
    _class("WatchResponse"),
)
WatchCancelRequest = _class("WatchCancelRequest")
LeaseGrantRequest, LeaseGrantResponse = _class("LeaseGrantRequest"), _class("LeaseGrantResponse")
LeaseRevokeRequest, LeaseRevokeResponse = _class("LeaseRevokeRequest"), _class("LeaseRevokeResponse")
LeaseKeepAliveRequest, LeaseKeepAliveResponse = _class("LeaseKeepAliveRequest"), _class("LeaseKeepAliveResponse")
LeaseTimeToLiveRequest, LeaseTimeToLiveResponse = _class("LeaseTimeToLiveRequest"), _class("LeaseTimeToLiveResponse")
StatusRequest, StatusResponse = _class("StatusRequest"), _class("StatusResponse")
AuthenticateRequest, AuthenticateResponse = _class("AuthenticateRequest"), _class("AuthenticateResponse")

TYPES: dict[str, tuple[Any, Any]] = {
    "/etcdserverpb.KV/Range": (RangeRequest, RangeResponse),
    "/etcdserverpb.KV/Put": (PutRequest, PutResponse),
    "/etcdserverpb.KV/DeleteRange": (DeleteRangeRequest, DeleteRangeResponse),
    "/etcdserverpb.KV/Txn": (TxnRequest, TxnResponse),
    "/etcdserverpb.KV/Compact": (CompactionRequest, CompactionResponse),
    "/etcdserverpb.Watch/Watch": (WatchRequest, WatchResponse),
    "/etcdserverpb.Lease/LeaseGrant": (LeaseGrantRequest, LeaseGrantResponse),
    "/etcdserverpb.Lease/LeaseRevoke": (LeaseRevokeRequest, LeaseRevokeResponse),
    "/etcdserverpb.Lease/LeaseKeepAlive": (LeaseKeepAliveRequest, LeaseKeepAliveResponse),
    "/etcdserverpb.Lease/LeaseTimeToLive": (LeaseTimeToLiveRequest, LeaseTimeToLiveResponse),
    "/etcdserverpb.Maintenance/Status": (StatusRequest, StatusResponse),
    "/etcdserverpb.Auth/Authenticate": (AuthenticateRequest, AuthenticateResponse),
}
"""Request and answer of every method."""
