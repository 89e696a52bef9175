"""A raw-bytes gRPC echo on a given port."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
from tests.bench.grpc_servers import LIMITS, Echo

if __name__ == "__main__":
    server = grpc.server(ThreadPoolExecutor(64), options=LIMITS)
    server.add_generic_rpc_handlers((Echo(lambda request, context: request),))
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    server.start()
    server.wait_for_termination()
