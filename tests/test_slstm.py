import conformance



@conformance.served("slstm")
def test_values_and_states(kernel, case):
    conformance.check_values_and_states("slstm", kernel, case)


@conformance.served("slstm")
def test_gradients(kernel, case):
    conformance.check_gradients("slstm", kernel, case)
