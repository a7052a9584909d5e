"""The way out of a sandbox that may reach package indexes: a listening socket, which the host's proxy answers.

The socket belongs to the network name space in which it is made, whoever holds it. The host's end is a descriptor that
this process inherited, or (with docker) a socket in a folder that both see.
"""

import os
import socket
import sys

PORT = 3128  # on the sandbox's own loopback device; proxies' customary one


def offer(way):
    """Listens, and gives the socket to the host; `way` is a descriptor or a path."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", PORT))
        listener.listen(128)
        try:
            with socket.socket(socket.AF_UNIX, fileno=way if isinstance(way, int) else None) as line:
                if isinstance(way, str):
                    line.connect(way)
                socket.send_fds(line, [b"."], [listener.fileno()])
        except OSError as error:
            raise SystemExit(f"the host's proxy is not reached ({error}); is the engine on another machine?") from error


def environment(home, command):
    """Variables of a workspace that has a door: where packages go, and for an agent's command where they come from."""
    prefix = os.path.join(home, "home", ".local")
    found = {"PIP_PREFIX": prefix}
    if command:
        here = f"http://127.0.0.1:{PORT}"
        found |= {"PIP_INDEX_URL": f"{here}/pypi/simple", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_CACHE_DIR": "1",
                  "UV_DEFAULT_INDEX": f"{here}/pypi/simple", "npm_config_registry": f"{here}/npm/",
                  "npm_config_audit": "false", "npm_config_fund": "false", "npm_config_update_notifier": "false",
                  "GOPROXY": f"{here}/go", "GOSUMDB": "off", "http_proxy": here, "https_proxy": here,
                  "no_proxy": "127.0.0.1,localhost"}
    return found


def packages(home):
    """The folder from which packages that were installed there are imported."""
    return os.path.join(home, "home", ".local", "lib", "python{}.{}".format(*sys.version_info), "site-packages")
