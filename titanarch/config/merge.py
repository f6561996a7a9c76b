"""How one configuration is laid over another."""

from typing import Any

from titanarch.config.places import Form, Slot, inside, registry_at
from titanarch.config.tree import Node


def merge(base: Node, over: Node, forms: tuple[Form, ...]) -> Node:
    """``over`` laid over ``base``, at a place where the schema allows ``forms``.

    Tables merge key by key; anything else is replaced. A component's table is replaced when ``over`` names another
    component, and a bare name stands for a table that names it and nothing else. A merged table counts as written where
    ``over`` wrote it, except on the command line.
    """
    if not isinstance(base.value, dict) and not isinstance(over.value, dict):
        return over
    key = _component_key(forms, base, over)
    base_table, over_table = _as_table(base, key), _as_table(over, key)
    if base_table is None or over_table is None or _renamed(base_table, over_table, key, forms):
        return over
    merged = dict(base_table)
    registry = registry_at(forms)
    name = over_table.get(key, base_table.get(key)) if key is not None else None
    holder = {registry.key: name.plain()} if registry is not None and name is not None else {}
    for part, node in over_table.items():
        merged[part] = merge(base_table[part], node, inside(forms, part, holder)) if part in base_table else node
    return Node(merged, base.origin if over.origin.line is None else over.origin)


def _component_key(forms: tuple[Form, ...], base: Node, over: Node) -> str | None:
    """The key that names the component at this place, or None where no component stands.

    Where the schema knows nothing (an unknown key, a component that is not registered), a table with ``kind`` is one.
    """
    registry = registry_at(forms)
    if registry is not None:
        return registry.key
    if forms:
        return None
    return "kind" if any(isinstance(node.value, dict) and "kind" in node.value for node in (base, over)) else None


def _as_table(node: Node, key: str | None) -> dict[str, Node] | None:
    if isinstance(node.value, dict):
        return node.value
    return {key: node} if key is not None and isinstance(node.value, str) else None


def _renamed(base: dict[str, Node], over: dict[str, Node], key: str | None, forms: tuple[Form, ...]) -> bool:
    """Whether ``over`` names another component than ``base`` does."""
    if key is None or key not in over:
        return False
    implied: Any = next((form.implied for form in forms if isinstance(form, Slot)), None)
    before = base[key].value if key in base else implied
    return before is not None and before != over[key].value
