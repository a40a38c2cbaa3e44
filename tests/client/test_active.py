from onebase.client.active import ActiveAdapter


def test_what_was_only_asked_counts_if_nothing_came_between():
    active = ActiveAdapter("policy_1")
    mark = active.mark

    active.hear("policy_2", mark)

    assert active.name == "policy_2"


def test_an_answer_that_is_older_than_what_was_heard_since_is_passed_over():
    active = ActiveAdapter("policy_1")
    mark = active.mark  # a keep-alive is sent
    active.hear("policy_2")  # another thread makes policy_2 active

    active.hear("policy_1", mark)  # the keep-alive's answer comes late

    assert active.name == "policy_2"


def test_what_made_an_adapter_active_always_counts():
    active = ActiveAdapter("policy_1")
    active.hear("policy_2", active.mark)

    active.hear("policy_3")

    assert active.name == "policy_3"
