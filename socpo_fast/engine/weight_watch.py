"""Notices what others do to a student's weights while an engine samples from them."""

from socpo_fast.model.decoder import Decoder


class WeightWatch:
    """Compares the student's parameters with what they were at the last `renew`.

        written in place    torch counts it in the tensor's _version; the step of an optimizer that
                            writes past torch is counted in model/shared.py
        storage replaced    the address is another one: .to(), load_state_dict(assign=True)

    This costs a fraction of a microsecond for each parameter, so it is done before every step.
    """

    def __init__(self, student: Decoder):
        self._student = student
        weight = student.lm_head.weight
        self._kind = (weight.dtype, weight.device)
        self.renew()

    def renew(self) -> None:
        """Takes the parameters as they are now for the engine's.

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
        self._entries = [
            (module._parameters, leaf)
            for module in self._student.modules()
            for leaf in module._parameters
        ]
        self._addresses = self._look()[0]
        self._num_own = len(self._addresses)
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
        if addresses[: self._num_own] != self._addresses[: self._num_own]:
            raise RuntimeError(
                "Engine: the student's weights must keep their storage, got another one (.to, "
                "load_state_dict(assign=True)); call bump_policy_version to sample from the new "
                "ones"
            )
        if addresses != self._addresses:
            raise RuntimeError(
                "Engine: parameters of the adopted model must stay views of the student's, got "
                "another storage (.to, load_state_dict(assign=True), FSDP); adopt the model again "
                "and make a new Engine"
            )
        return writes != self._writes

    def _look(self) -> tuple[list[int], list[int]]:
        """Returns the parameters' addresses, and counts of writes to them."""
        params = [param for table, leaf in self._entries if (param := table[leaf]) is not None]
        # Tensors made in torch.inference_mode do not count their writes.
        writes = [0 if param.is_inference() else param._version for param in params]
        if self._student.shared:
            writes.append(self._student.shared.num_optimizer_steps)
        return [param.data_ptr() for param in params], writes
