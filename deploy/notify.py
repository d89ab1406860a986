"""Tells an address of every run that fails: echo URL | python deploy/notify.py

The address, by standard input since it is often a secret, gets {"text": ...} by POST, as Slack, Mattermost and
their like take it. It is kept, encrypted, in a block of Prefect's; said again, the new one replaces the old.
"""

import sys
from datetime import timedelta
from uuid import UUID

from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.events import AutomationCore, EventTrigger, Posture, SendNotification

NAME = "bessemer-failed"
BODY = "{{ flow_run.name }} ended as {{ flow_run.state.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}"


def main(url: str) -> None:
    """Save the address and make the automation that uses it."""
    block = CustomWebhookNotificationBlock(
        name=NAME,
        url=url,
        json_data={"text": "{{subject}}\n{{body}}"},
        headers=None,
        cookies=None,
    ).save(NAME, overwrite=True)
    assert isinstance(block, UUID)  # not in an event loop
    trigger = EventTrigger(
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        # Only what was started as a whole: the subflows of a failed run fail too.
        match_related={
            "prefect.resource.role": "deployment",
            "prefect.resource.id": "prefect.deployment.*",
        },
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )
    action = SendNotification(block_document_id=block, subject="Bessemer", body=BODY)
    with get_client(sync_client=True) as client:
        for known in client.read_automations_by_name(NAME):
            client.delete_automation(known.id)
        client.create_automation(AutomationCore(name=NAME, trigger=trigger, actions=[action]))


if __name__ == "__main__":
    main(sys.stdin.readline().strip())
