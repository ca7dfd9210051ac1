"""The types of effects that a run directory handles are those of which the checks before a run know."""

from noether import Effect, open_run
from noether.core.effect import ShowProgress
from noether.effects.evaluation_logs import EvaluationLogs
from noether.effects.handled_effects import HANDLED_EFFECTS
from noether.effects.logs.tensorboard import TensorBoard


class Ring(Effect):
    pass


def subclasses(kind):
    return {kind, *(below for each in kind.__subclasses__() for below in subclasses(each))}


def test_every_effect_of_noether_that_can_be_requested_is_handled(tmp_path):
    shipped = {each for each in subclasses(Effect) if each.__module__.startswith("noether.core.")}
    abstract = {each for each in shipped if each.__subclasses__()}
    with open_run(tmp_path) as directory:
        handled = {each for each in subclasses(Effect) if directory.interpreter.handles(each)}
        extended = directory.interpreter.with_handlers(Ring, lambda effect, state, event: None)
        assert extended.handles(Ring)
    assert handled == set(HANDLED_EFFECTS) == shipped - abstract
    assert {ShowProgress, Ring} & handled == {ShowProgress}


def test_services_are_found_by_name(tmp_path):
    services = [TensorBoard(tmp_path / "tensorboard")]
    with open_run(tmp_path / "run", services=services) as directory:
        assert directory.services == {"tensorboard": services[0]}
    with open_run(tmp_path / "other") as directory:
        assert directory.services == {}
    logs = EvaluationLogs(tmp_path / "run", "E1", services=services)
    assert logs.services == {"tensorboard": services[0]}
    assert logs.claim_folder() == logs.claim_folder() == tmp_path / "run/eval/E1"
    logs.close()
    assert not (tmp_path / "run/eval/E1").exists()
