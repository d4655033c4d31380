"""Labels and label sets."""

import pytest

from ciliate.labels import Label, LabelSet, parse_label


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("app=web", Label("unspec", "app", "web")),
        ("k8s:app=web", Label("k8s", "app", "web")),
        ("any:app", Label("any", "app", "")),
        ("reserved:host", Label("reserved", "host", "")),
        ("cidr:10.0.0.0/8", Label("cidr", "10.0.0.0/8", "")),
        ("k8s:url=http://x", Label("k8s", "url", "http://x")),
        ("foo:bar=baz", Label("unspec", "foo:bar", "baz")),
        ("k8s:a=b=c", Label("k8s", "a", "b=c")),
    ],
)
def test_parse(text: str, expected: Label) -> None:
    assert parse_label(text) == expected


@pytest.mark.parametrize("text", ["", "=value", "k8s:", "k8s:=v"])
def test_a_label_without_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_label(text)


def test_equal_sets_have_equal_keys_whatever_the_order() -> None:
    one = LabelSet.parse(["k8s:b=2", "k8s:a=1"])
    other = LabelSet.parse(["k8s:a=1", "k8s:b=2"])
    assert one == other
    assert hash(one) == hash(other)
    assert one.key == "k8s:a=1;k8s:b=2;"


def test_a_later_value_of_the_same_key_wins() -> None:
    labels = LabelSet.parse(["k8s:a=1"]).union([Label("k8s", "a", "2")])
    assert labels.strings() == ["k8s:a=2"]


def test_any_source_looks_everywhere() -> None:
    labels = LabelSet.parse(["container:app=x", "k8s:app=y"])
    assert labels.get("app", "k8s") == "y"
    assert labels.get("app") == "x"
    assert labels.get("app", "reserved") is None
    assert Label("k8s", "app", "y") in labels
    assert Label("k8s", "app", "x") not in labels


TRICKY = [
    [("k8s", "user", "admin;k8s:zone=x")],
    [("k8s", "user", "admin"), ("k8s", "zone", "x")],
    [("k8s", "user", "admin;")],
    [("k8s", "user", "admin%3B")],
    [("k8s", "user", "100%")],
    [("k8s", "user", "100%25")],
    [("k8s", "user=x", "y")],
    [("k8s", "user", "x=y")],
    [("k8s:user", "x", "y")],
    [("k8s", "user:x", "y")],
    [("/n1", "user", "x")],
    [("unspec", "container:user", "x")],
    [("container", "user", "x")],
    [("custom", "user", "x")],
    [("unspec", "custom:user", "x")],
    [],
]


def test_keys_are_equal_for_equal_sets_alone() -> None:
    sets = [LabelSet(Label(*item) for item in labels) for labels in TRICKY]
    assert len({labels.key for labels in sets}) == len(sets)
    assert all(LabelSet.from_key(labels.key) == labels for labels in sets)
    assert not [one for one in sets for other in sets if other.key.startswith(f"{one.key}/")]
