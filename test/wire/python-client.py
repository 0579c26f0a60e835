# Python's SDK as a client: calls by name from standard input, their outputs or errors on standard output, as JSON.
import base64, datetime, json, sys

import boto3
import botocore.exceptions
from botocore.config import Config

endpoint, region = sys.argv[1:]


def plain(value):
    if isinstance(value, datetime.datetime):
        moment = value.astimezone(datetime.timezone.utc)
        return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.read().decode()  # S3's body


def answer(service, operation, params):
    client = boto3.client(
        service,
        region_name=region,
        endpoint_url=endpoint,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(retries={"total_max_attempts": 1}),
    )
    try:
        output = getattr(client, operation)(**params)
        output.pop("ResponseMetadata")
        return {"output": output}
    except botocore.exceptions.ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return {"error": {**error.response["Error"], "status": status}}


json.dump([answer(*call) for call in json.load(sys.stdin)], sys.stdout, default=plain)
