"""What an error says."""

import re

import pytest


def complain(error, message, call):
    """Check that a call raises this error, in one sentence that contains the message."""
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
