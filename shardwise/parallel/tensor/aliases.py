"""Which values of a graph share their storage with one that an operation writes into."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from shardwise.parallel.tensor.elementwise import writes

RETURNS = ("dropout", "feature_dropout", "alpha_dropout", "type_as", "expand_as")  # may hand out what they are given


def written(graph: fx.Graph) -> list[frozenset[fx.Node]]:
    """The groups of nodes that may share a storage, of those groups that have a node that writes."""
    group: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        mine = {node}
        for one in _shared(node):
            mine |= group.get(one, {one})
        for one in mine:
            group[one] = mine
    distinct = {id(each): each for each in group.values()}.values()
    return [frozenset(each) for each in distinct if any(writes(node) for node in each)]


def _shared(node: fx.Node) -> Iterator[fx.Node]:
    """The operands whose storage the results may have."""
    if node.op != "call_function":
        return
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # a result of several
        yield from node.all_input_nodes
        return
    if getattr(node.target, "_opname", "") in RETURNS or any(one.alias_info is not None for one in schema.returns):
        given = (*node.args, *node.kwargs.values())
        yield from (one for one in given if isinstance(one, fx.Node))
