"""Starting runs and comparisons."""

from data_prep.versions import require_versions

require_versions()
