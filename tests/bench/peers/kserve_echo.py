"""KServe's model server with a model that copies its input; run by a Python that has kserve."""

from __future__ import annotations

import sys

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class Echo(Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("echo")
        self.ready = True

    async def predict(self, payload: InferRequest, *unused: object, **more: object) -> object:
        given = payload.inputs[0]
        output = InferOutput("output", given.shape, given.datatype)
        output.set_data_from_numpy(given.as_numpy(), binary_data=True)
        return InferResponse(payload.id, "echo", [output])


if __name__ == "__main__":
    grpc_port, http_port = map(int, sys.argv[1:])
    server = ModelServer(http_port=http_port, grpc_port=grpc_port, workers=1)
    server.start([Echo()])
