"""Names and numbers that a server and its clients must share."""

SERVICE = "expertd_wire.v1.Experts"
ADMIN_SERVICE = "expertd_wire.v1.Admin"
FORWARD = f"/{SERVICE}/Forward"
FORWARD_STREAM = f"/{SERVICE}/ForwardStream"
LIST_LAYERS = f"/{SERVICE}/ListLayers"
GET_LAYER = f"/{SERVICE}/GetLayer"
GET_CAPABILITIES = f"/{SERVICE}/GetCapabilities"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"

DEFAULT_MAX_MESSAGE_BYTES = 256 << 20
MESSAGE_SLACK_BYTES = 1 << 20
"""gRPC's own limit is ours plus this, so that it is our check that answers, and names the flag."""

STATUS_KEY = "grpc-status-details-bin"
"""The trailing metadata that carries a serialised google.rpc.Status."""
