//go:build race

package compile_test

func init() { raceDetector = true }
