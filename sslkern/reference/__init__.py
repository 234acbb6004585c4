"""The kernels in plain torch. Tests compare the other back-ends with them. They are also the fake (meta) kernels, and
run where no other back-end does."""
