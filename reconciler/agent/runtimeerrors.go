package agent

import "errors"

// Errors of a Runtime that the agent tells apart. A Runtime wraps them.
var (
	// ErrNotFound: the sandbox, container or log does not exist.
	ErrNotFound = errors.New("not found")
	// ErrInvalidContainer: the pod's description cannot be carried out; trying again
	// without a change is pointless.
	ErrInvalidContainer = errors.New("invalid container")
	// ErrRunAsRoot: runAsNonRoot is set and the container would run as root.
	ErrRunAsRoot = errors.New("runAsNonRoot is set, but the container would run as root")

	// ErrImageInvalid: the image's name cannot be parsed.
	ErrImageInvalid = errors.New("invalid image name")
	// ErrImageNeverPull: the pull policy is Never and the image is not present.
	ErrImageNeverPull = errors.New("image is not present and its pull policy is Never")
	// ErrImageNotFound: the registry has no such image or tag.
	ErrImageNotFound = errors.New("image not found")
	// ErrImageUnauthorized: the registry refuses the credentials, or wants some.
	ErrImageUnauthorized = errors.New("the registry refuses access")
	// ErrRegistryUnreachable: the registry does not answer.
	ErrRegistryUnreachable = errors.New("the registry cannot be reached")
)
