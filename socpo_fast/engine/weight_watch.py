"""Notices what others do to a student's weights while an engine samples from them."""

from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from socpo_fast.model.decoder import Decoder


class WeightWatch:
    """Compares the student's parameters with what they were at the last `renew`.

        written in place    torch counts it in the tensor's _version. Fused optimizers write past
                            that count, so the steps of torch's optimizers are counted, too
        storage replaced    the address is another one: .to(), load_state_dict(assign=True); or a
                            module has been replaced, as adapters are put in

    With a live module that shares the storage (model/shared.py) its parameters are watched as well.
    A look costs a fraction of a microsecond for each parameter and module: one before every step.
    """

    def __init__(self, student: Decoder):
        self._student = student
        weight = student.lm_head.weight
        self._kind = (weight.dtype, weight.device)
        self._num_optimizer_steps = 0
        # Fixed here, not at a renew: what the live module is now belongs to the link.
        shared = student.shared
        self._shared_children = _children(shared.module) if shared else []
        self.renew()
        if not _watches:
            register_optimizer_step_post_hook(_count_step)
        _watches.add(self)

    def renew(self) -> None:
        """Takes the student's parameters as they are now for the engine's.

        Raises:
            RuntimeError: they have another dtype or device than the engine, or a module that
                shares their storage has left it.
        """
        weight = self._student.lm_head.weight
        if self._kind != (weight.dtype, weight.device):
            raise RuntimeError(
                f"Engine: weights must stay {self._kind[0]} on {self._kind[1]}, got {weight.dtype} "
                f"on {weight.device}; make a new Engine"
            )
        # Tables and names instead of parameters, since a module may get another parameter.
        self._entries: list[tuple[dict[str, Any], str]] = [
            (module._parameters, leaf)
            for module in self._student.modules()
            for leaf, param in module._parameters.items()
            if param is not None
        ]
        self._own_children = _children(self._student)
        self._num_own = len(self._entries)
        self._addresses = self._look()[0]
        if shared := self._student.shared:
            self._entries += shared.entries()
            self._addresses += shared.addresses()
        self._writes = self._look()[1]
        self.is_written()

    def is_written(self) -> bool:
        """Whether a weight was written in place since the last `renew`.

        Raises:
            RuntimeError: a parameter, of the student or of a module that shares its storage, has
                another storage now.
        """
        addresses, writes = self._look()
        own = addresses[: self._num_own]
        if own != self._addresses[: self._num_own] or _are_replaced(self._own_children):
            raise RuntimeError(
                "Engine: the student's weights must keep their storage, got another one (.to, "
                "load_state_dict(assign=True)); call bump_policy_version to sample from the new "
                "ones"
            )
        if addresses != self._addresses or _are_replaced(self._shared_children):
            raise RuntimeError(
                "Engine: parameters of the adopted model must stay views of the student's, got "
                "another storage or module (.to, load_state_dict(assign=True), FSDP, an adapter); "
                "adopt the model again and make a new Engine"
            )
        return writes != self._writes

    def note_step(self, stepped: set[int]) -> None:
        """Counts a step of an optimizer that holds the parameters with these ids."""
        if any(id(table.get(leaf)) in stepped for table, leaf in self._entries):
            self._num_optimizer_steps += 1

    def _look(self) -> tuple[list[int], list[int]]:
        """Returns the parameters' addresses (0: removed), and counts of writes to them."""
        params = [table.get(leaf) for table, leaf in self._entries]
        # Tensors made in torch.inference_mode do not count their writes.
        writes = [0 if p is None or p.is_inference() else p._version for p in params]
        addresses = [0 if p is None else p.data_ptr() for p in params]
        return addresses, [*writes, self._num_optimizer_steps]


def _children(module: nn.Module) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Returns every module below this one, with the table of its parent and its name there."""
    return [
        (parent._modules, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
    ]


def _are_replaced(children: list[tuple[dict[str, Any], str, nn.Module]]) -> bool:
    return any(table.get(name) is not child for table, name, child in children)


_watches: WeakSet[WeightWatch] = WeakSet()


def _count_step(optimizer: Optimizer, *_args: object) -> None:
    """Is called by torch after every optimizer step of the process."""
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for watch in list(_watches):
        watch.note_step(stepped)
