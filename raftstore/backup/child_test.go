package backup_test

func childMain() bool { return false }
