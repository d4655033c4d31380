"""Features of plugins in the datapath: C headers whose functions are called at the hooks of `lib/hooks.h`.

The headers are part of the compiled object and of its name in the cache. Maps that a header defines are pinned beside
the others. A node without features carries nothing of this.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ciliate import atomicfile
from ciliate.datapath.errors import DatapathError

HOOKS = ("egress", "ingress", "leave")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}\Z")


class Feature(Protocol):
    """What a provider of kind ``feature`` makes.

    ``header`` defines ``static always_inline int NAME_HOOK(struct __sk_buff *skb, struct pkt *pkt)`` for each of
    ``hooks``, which gives 0 to go on or a drop reason from 200 to 255.
    """

    name: str
    header: Path
    hooks: Sequence[str]


def feature_defines(features: Sequence[Feature], cache: Path) -> tuple[str, ...]:
    """What to compile with so that these features are in; writes the generated header below ``cache``.

    DatapathError names the feature and what is wrong with it.
    """
    if not features:
        return ()
    for feature in features:
        _check(feature)
    content = hashlib.sha256()
    for feature in features:
        content.update(f"{feature.name}\0{','.join(feature.hooks)}\0".encode())
        content.update(feature.header.read_bytes())
    text = _generated(features)
    path = cache / f"features-{content.hexdigest()[:16]}.h"
    cache.mkdir(parents=True, exist_ok=True)
    atomicfile.write_bytes(path, text.encode(), 0o644)
    return (f'CILIATE_FEATURES="{path}"',)


def _check(feature: Feature) -> None:
    if not _NAME.match(feature.name):
        raise DatapathError(errno.EINVAL, f"feature {feature.name!r}: expected a name of a-z, 0-9 and '_'")
    unknown = [hook for hook in feature.hooks if hook not in HOOKS]
    if unknown or not feature.hooks:
        given = ", ".join(unknown) or "no hook"
        raise DatapathError(
            errno.EINVAL, f"feature {feature.name}: {given} given, expected hooks of {', '.join(HOOKS)}"
        )
    if not feature.header.is_file():
        raise DatapathError(errno.ENOENT, f"feature {feature.name}: header {feature.header} is not there")


def _generated(features: Sequence[Feature]) -> str:
    lines = ["/* generated: the features of this node */", *(f'#include "{item.header}"' for item in features)]
    for hook in HOOKS:
        users = [feature.name for feature in features if hook in feature.hooks]
        if not users:
            continue
        calls = [f"\treason = {name}_{hook}(skb, pkt);\n\tif (reason)\n\t\treturn reason;" for name in users]
        lines += [
            f"#define HOOK_{hook.upper()}(skb, pkt) hook_{hook}(skb, pkt)",
            f"static always_inline int hook_{hook}(struct __sk_buff *skb, struct pkt *pkt)",
            "{",
            "\tint reason;",
            *calls,
            "\treturn 0;",
            "}",
        ]
    return "\n".join(lines) + "\n"
