// Package peer carries what the servers of a cluster say to each other: raft's own
// messages, and beside them forwarded proposals, read indexes, and calls by name
// (status, membership, git). Everything travels over mutual TLS on the one port that
// a server has; [Mux] tells the protocols apart.
//
// It moves bytes and decides nothing: who may connect is the Admit function's matter,
// what a call does that of its handler.
package peer

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// The protocols by ALPN beside those of HTTP.
const (
	ProtocolRaft = "decree-raft" // hashicorp/raft's network transport
	ProtocolPeer = "decree-peer" // the calls of this package
)

// A message is a frame: length of what follows (4 bytes, big endian), id of the call
// (4 bytes), method or status (1 byte), payload. Answers carry the id of their call
// and come in any order.
const (
	headSize = 9
	// maxFrame bounds the payload: one log entry, or an answer.
	maxFrame = command.MaxEntry + 4096
)

// The methods. Their numbers are part of the protocol.
const (
	methodPropose   = 1 // an encoded transaction
	methodReadIndex = 2 // nothing
	methodCall      = 3 // name, its length first; then the handler's payload
)

// The statuses of answers.
const (
	statusOK        = 0
	statusRejected  = 1 // of a proposal: see appendRejection
	statusNotLeader = 2
	statusUnknown   = 3 // whether the transaction was applied is not known
	statusError     = 4 // code, its length first; then text
)

// Identity is who is at the other end, as the certificate says.
type Identity struct {
	Name   string   // common name
	Groups []string // organisations
}

// IdentityOf reads the identity from the verified chain.
func IdentityOf(state tls.ConnectionState) (Identity, bool) {
	if len(state.VerifiedChains) == 0 || len(state.VerifiedChains[0]) == 0 {
		return Identity{}, false
	}
	s := state.VerifiedChains[0][0].Subject
	return Identity{Name: s.CommonName, Groups: s.Organization}, s.CommonName != ""
}

// RemoteError is an error that the other server answered with.
type RemoteError struct {
	// Code is what callers decide by: the ErrorCode of the other server's error, if it
	// had one.
	Code string
	Text string
}

// Error implements error.
func (e *RemoteError) Error() string { return e.Text }

// ErrorCode has the code go on when the error is passed on.
func (e *RemoteError) ErrorCode() string { return e.Code }

// coded is implemented by errors that callers on other servers tell apart.
type coded interface {
	error
	ErrorCode() string
}

// appendError encodes an error as a status and a payload.
func appendError(b []byte, err error) (byte, []byte) {
	status := errorStatus(err)
	if status == statusError {
		code := ""
		if c, ok := errors.AsType[coded](err); ok {
			code = c.ErrorCode()[:min(255, len(c.ErrorCode()))]
		}
		b = append(append(b, byte(len(code))), code...)
	}
	return status, append(b, err.Error()...)
}

// appendResult encodes the outcome of a proposal as a status and a payload.
func appendResult(b []byte, r command.Result, err error) (byte, []byte) {
	if err != nil {
		return appendError(b, err)
	}
	b = binary.AppendUvarint(b, r.Revision)
	if r.Rejected == nil {
		return statusOK, binary.AppendUvarint(b, uint64(r.Missing))
	}
	b = append(b, byte(r.Rejected.Code))
	for _, s := range []string{string(r.Rejected.Key.Resource), r.Rejected.Key.Namespace, r.Rejected.Key.Name} {
		b = append(binary.AppendUvarint(b, uint64(len(s))), s...)
	}
	return statusRejected, append(b, r.Rejected.Message...)
}

// errorStatus says what the caller may conclude.
func errorStatus(err error) byte {
	switch {
	case errors.Is(err, raftstore.ErrNotLeader):
		return statusNotLeader
	case errors.Is(err, raftstore.ErrLeadershipLost), errors.Is(err, raftstore.ErrClosed), errors.Is(err, raftstore.ErrFatal):
		return statusUnknown
	}
	return statusError
}

var errMalformed = errors.New("malformed answer")

// parseResult is the inverse of appendResult.
func parseResult(status byte, b []byte) (command.Result, error) {
	if status != statusOK && status != statusRejected {
		return command.Result{}, answerError(status, b)
	}
	revision, n := binary.Uvarint(b)
	if n <= 0 {
		return command.Result{}, errMalformed
	}
	b = b[n:]
	if status == statusOK {
		missing, n := binary.Uvarint(b)
		if n <= 0 {
			return command.Result{}, errMalformed
		}
		return command.Result{Revision: revision, Missing: int(missing)}, nil
	}
	if len(b) == 0 {
		return command.Result{}, errMalformed
	}
	code := command.Code(b[0])
	b = b[1:]
	var parts [3]string
	for i := range parts {
		size, n := binary.Uvarint(b)
		if n <= 0 || size > uint64(len(b)-n) {
			return command.Result{}, errMalformed
		}
		parts[i] = string(b[n : n+int(size)])
		b = b[n+int(size):]
	}
	key := api.Key{Resource: api.Resource(parts[0]), Namespace: parts[1], Name: parts[2]}
	return command.Result{Revision: revision, Rejected: &command.Rejection{Code: code, Key: key, Message: string(b)}}, nil
}

// answerError makes an error of an answer that is none.
func answerError(status byte, b []byte) error {
	switch status {
	case statusNotLeader:
		return fmt.Errorf("%w (%s)", raftstore.ErrNotLeader, b)
	case statusUnknown:
		return fmt.Errorf("%w (%s)", raftstore.ErrLeadershipLost, b)
	case statusError:
		if len(b) == 0 || len(b) < 1+int(b[0]) {
			return errMalformed
		}
		return &RemoteError{Code: string(b[1 : 1+b[0]]), Text: string(b[1+b[0]:])}
	}
	return fmt.Errorf("%w: status %d", errMalformed, status)
}
