"""The option that names the dataset list."""

from simpletuner.config.options.kinds import PathText, Slice


class DataOptions(Slice):
    """Data."""

    data_backend_config: PathText | None = None
    """The file that lists the datasets. By default `multidatabackend.json` beside the config."""
