from noether.reports.setting_paths import comparable_settings

LR = {"kind": "noether.core.callbacks.LrCallback", "every_n_epochs": 1}
STOP = {"kind": "my_module.Stop", "after": 3}


def differing(*configs):
    first, second = map(comparable_settings, configs)
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


def test_a_callback_that_one_run_has_in_addition_leaves_the_others_equal():
    names = differing({"callbacks": [LR, STOP]}, {"callbacks": [STOP]})
    assert names == {"callbacks[LrCallback].kind", "callbacks[LrCallback].every_n_epochs"}


def test_callbacks_of_one_name_are_numbered():
    names = differing({"callbacks": [LR, LR]}, {"callbacks": [LR, {**LR, "every_n_epochs": 2}]})
    assert names == {"callbacks[LrCallback 2].every_n_epochs"}


def test_lists_that_hold_no_settings_stay_as_they_are():
    assert comparable_settings({"callbacks": ["default"]}) == {"callbacks.0": "default"}
