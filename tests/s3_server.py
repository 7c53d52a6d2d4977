"""An S3 on this machine, moto's, and what clients need in their environment to find it."""

from contextlib import contextmanager
from urllib.request import Request, urlopen

import fsspec
from moto.server import ThreadedMotoServer

BUCKET = "models"


@contextmanager
def s3():
    """Run it; yields what belongs into the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        # What an earlier server of this process held would still be there.
        urlopen(Request(f"{endpoint}/moto-api/reset", method="POST")).close()
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "with-a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


def client():
    """Return the client that lingconv uses too, without what it remembers."""
    system = fsspec.filesystem("s3")
    system.invalidate_cache()
    return system


def listing(folder):
    """Return the bytes of all files below a folder of the bucket, by relative name."""
    root = f"{BUCKET}/{folder}"
    found = client().find(root)
    return {path.removeprefix(root + "/"): client().cat_file(path) for path in found}
