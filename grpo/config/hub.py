"""Whether the Hugging Face hub can be used, or only what its cache on this machine has."""

import logging
import os
import re
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

logger = logging.getLogger(__name__)
CONNECT_S = 5

_unreachable: str | None = None  # why the hub cannot be reached, if that was found


def is_hub_name(name: str) -> bool:
    """Whether a name can be that of a model or data set on the hub, and not only that of a folder."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not Path(name).exists()


def why_offline() -> str | None:
    """Why only the cache is used; None if the hub is used."""
    from huggingface_hub import constants

    if _unreachable is not None:
        return _unreachable
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None


def use_cache_if_hub_is_unreachable(*names: object) -> None:
    """Use only the cache if one of the names can be on the hub and no connection to it is possible.

    Without such a name nothing changes. The effect is that of HF_HUB_OFFLINE=1, in this process and until a call that
    finds a connection. Without it huggingface_hub tries each of many requests six times, in all for minutes, before it
    looks into the cache. Behind a proxy no connection is tried.
    """
    global _unreachable
    from huggingface_hub import constants

    if not any(isinstance(name, str) and is_hub_name(name) for name in names):
        return
    if constants.HF_HUB_OFFLINE and _unreachable is None:  # the user's choice
        return
    error = _connection_error(constants.ENDPOINT)
    if (error is None) == (_unreachable is None):  # as before
        return
    if error is not None:
        logger.warning("no connection to %s (%s): only what is in the cache is used", constants.ENDPOINT, error)
    _unreachable = None if error is None else f"there is no connection to {constants.ENDPOINT}"
    constants.HF_HUB_OFFLINE = error is not None  # read at each request
    if "datasets" in sys.modules:  # it copied the value when it was imported
        of_user = os.environ.get("HF_DATASETS_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
        sys.modules["datasets"].config.HF_HUB_OFFLINE = error is not None or of_user


def _connection_error(endpoint: str) -> OSError | None:
    address = urlsplit(endpoint)
    if {address.scheme, "all"} & getproxies().keys():
        return None
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_S).close()
    except OSError as error:
        return error
    return None
