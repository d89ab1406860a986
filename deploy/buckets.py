"""Makes the buckets of the given s3:// addresses, those that are not there."""

import sys

import boto3

s3 = boto3.client("s3")
there = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
for bucket in {address.removeprefix("s3://").partition("/")[0] for address in sys.argv[1:]} - there:
    s3.create_bucket(Bucket=bucket)
