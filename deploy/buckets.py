"""Makes the buckets of the given s3:// addresses, those that are not there."""

import sys
from http import HTTPStatus

import boto3

s3 = boto3.client("s3")
for bucket in {address.removeprefix("s3://").partition("/")[0] for address in sys.argv[1:]}:
    try:
        # Not from a list of all: an account for these buckets alone may not ask for it.
        s3.head_bucket(Bucket=bucket)
    except s3.exceptions.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.NOT_FOUND:
            raise
        # AWS wants to be told of a region, but for its first one.
        region = s3.meta.region_name
        is_told = region not in (None, "us-east-1")
        where = {"CreateBucketConfiguration": {"LocationConstraint": region}} if is_told else {}
        s3.create_bucket(Bucket=bucket, **where)
