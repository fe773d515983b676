package seal

func child() bool { return false }
