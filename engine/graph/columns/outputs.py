"""The outputs of a graph in columns. A graph of 250,000 of them counts against the memory budget of its merge."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TypeVar, overload

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the output model.

    Args:
        name: name of the tensor.
        node: the node that computes the tensor.
        group: group of tensors that keep the order of their source in the layout, such as a slice of the recipe.
        folder: folder of the tensor's model in OUT: the name of a saved stage, or empty.
    """

    name: str
    node: int
    group: int
    folder: str = ""

    @property
    def label(self) -> str:
        """The unique name of the output: the tensor's name, with the folder as a prefix."""
        return f"{self.folder}/{self.name}" if self.folder else self.name


class Outputs(Sequence[Output]):
    """The outputs of a graph: 16 bytes for each, besides its name.

    Attributes:
        names: names of the tensors.
        nodes: nodes that compute them.
    """

    __slots__ = ("_folders", "_groups", "names", "nodes")

    def __init__(self) -> None:
        self.names: list[str] = []
        self.nodes = array("I")
        self._groups = array("I")
        self._folders: list[tuple[int, str]] = []  # the first output of each run of outputs in one folder

    def add(self, name: str, node: int, group: int, folder: str) -> None:
        """Append an output; see `Output`."""
        if not self._folders or self._folders[-1][1] != folder:
            self._folders.append((len(self.names), folder))
        self.names.append(name)
        self.nodes.append(node)
        self._groups.append(group)

    def moved(self, nodes: array[int]) -> Outputs:
        """The same outputs, of other nodes. The names are not stored again."""
        outputs = Outputs()
        outputs.names, outputs.nodes, outputs._groups, outputs._folders = self.names, nodes, self._groups, self._folders
        return outputs

    def extend(self, names: Sequence[str], nodes: Sequence[int], group: int, folder: str = "") -> None:
        """Append the outputs of several nodes, at least one."""
        self.add(names[0], nodes[0], group, folder)
        self.names.extend(names[1:])
        self.nodes.extend(nodes[1:])
        self._groups.extend([group] * (len(names) - 1))

    def label(self, number: int) -> str:
        """The label of an output."""
        if len(self._folders) == 1 and not self._folders[0][1]:
            return self.names[number]
        return self._output(number).label

    def of_nodes(self, values: Sequence[T]) -> Iterator[T]:
        """For each output, the value of its node.

        Args:
            values: the value of each node.
        """
        return map(values.__getitem__, self.nodes)

    def in_folder(self, folder: str) -> Sequence[int]:
        """The numbers of the outputs in a folder."""
        if [folder] == [name for _, name in self._folders]:
            return range(len(self.names))
        bounds = pairwise([*(first for first, _ in self._folders), len(self.names)])
        runs = zip(self._folders, bounds, strict=True)
        return list(chain.from_iterable(range(*run) for (_, name), run in runs if name == folder))

    @property
    def folders(self) -> list[str]:
        """The folders, each once."""
        return list(dict.fromkeys(folder for _, folder in self._folders))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Output]:
        return map(self._output, range(len(self.names)))

    @overload
    def __getitem__(self, index: int) -> Output: ...
    @overload
    def __getitem__(self, index: slice) -> list[Output]: ...
    def __getitem__(self, index: int | slice) -> Output | list[Output]:
        numbers = range(len(self.names))[index]
        return self._output(numbers) if isinstance(numbers, int) else list(map(self._output, numbers))

    def _output(self, number: int) -> Output:
        folder = next(folder for first, folder in reversed(self._folders) if first <= number)
        return Output(self.names[number], self.nodes[number], self._groups[number], folder)
