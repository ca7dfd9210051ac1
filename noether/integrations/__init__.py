"""noether's callbacks in the loops of other frameworks; each module imports one of them and builds on `Session`.

Code here may touch its framework, and what `noether.session` may. `noether.config.load_callbacks` reads callbacks from
YAML.
"""
