"""Whether the Hugging Face hub can be used, or only what its cache on this machine has."""

import logging
import os
import re
import socket
import sys
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

logger = logging.getLogger(__name__)
CONNECT_S = 5


def is_hub_name(name: str) -> bool:
    """Whether a name can be that of a model or data set on the hub, and not only that of a folder."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not Path(name).exists()


@cache
def why_offline() -> str | None:
    """Why only the cache is used; None if the hub is.

    If no connection to the hub is possible, the process and those that it starts use only the cache, as with
    HF_HUB_OFFLINE=1. Otherwise huggingface_hub tries each of many requests six times, in all for minutes, before it
    looks into the cache. Behind a proxy this is not tried.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(constants.ENDPOINT)
    if {address.scheme, "all"} & getproxies().keys():
        return None
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_S).close()
    except OSError as error:
        logger.warning("no connection to %s (%s): only what is in the cache is used", constants.ENDPOINT, error)
        constants.HF_HUB_OFFLINE = True  # read at each request
        os.environ["HF_HUB_OFFLINE"] = "1"
        if "datasets" in sys.modules:  # it copied the value when it was imported
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return f"there is no connection to {constants.ENDPOINT}"
    return None
