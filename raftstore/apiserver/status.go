package apiserver

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// statusOf turns any error into the Status that clients get. Errors that are not
// about the request are logged by the caller and shown with their text: operators
// are the only readers, and errors never carry secrets.
func statusOf(err error) *metav1.Status {
	var known apierrors.APIStatus
	var rejected *command.Rejection
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &known):
		s := known.Status()
		return &s
	case errors.As(err, &rejected):
		return rejectionStatus(rejected)
	case errors.As(err, &tooLarge):
		return &apierrors.NewRequestEntityTooLargeError("limit is " + strconv.FormatInt(tooLarge.Limit, 10) + " bytes").ErrStatus
	case errors.Is(err, ErrNotFound):
		return newStatus(http.StatusNotFound, metav1.StatusReasonNotFound, err.Error())
	case errors.Is(err, raftstore.ErrNotLeader), errors.Is(err, raftstore.ErrClosed), errors.Is(err, raftstore.ErrLeadershipLost):
		status := newStatus(http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, err.Error())
		status.Details = &metav1.StatusDetails{RetryAfterSeconds: 1}
		return status
	case errors.Is(err, context.DeadlineExceeded):
		return &apierrors.NewTimeoutError(err.Error(), 1).ErrStatus
	case errors.Is(err, context.Canceled):
		return &apierrors.NewServiceUnavailable("the server is stopping").ErrStatus
	}
	return &apierrors.NewInternalError(err).ErrStatus
}

func rejectionStatus(r *command.Rejection) *metav1.Status {
	code, reason := int32(http.StatusUnprocessableEntity), metav1.StatusReasonInvalid
	switch r.Code {
	case command.Conflict:
		code, reason = http.StatusConflict, metav1.StatusReasonConflict
	case command.Exists:
		code, reason = http.StatusConflict, metav1.StatusReasonAlreadyExists
	case command.NotFound:
		code, reason = http.StatusNotFound, metav1.StatusReasonNotFound
	case command.Forbidden:
		code, reason = http.StatusForbidden, metav1.StatusReasonForbidden
	}
	s := newStatus(code, reason, r.Error())
	s.Details = &metav1.StatusDetails{Name: r.Key.Name, Kind: string(r.Key.Resource)}
	return s
}

func newStatus(code int32, reason metav1.StatusReason, message string) *metav1.Status {
	return &metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"},
		Status:   metav1.StatusFailure,
		Code:     code,
		Reason:   reason,
		Message:  message,
	}
}

func statusError(code int32, reason metav1.StatusReason, message string) error {
	return &apierrors.StatusError{ErrStatus: *newStatus(code, reason, message)}
}

func groupResource(r api.Resource) schema.GroupResource { return schema.ParseGroupResource(string(r)) }

// fail answers with the Status of err.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	status := statusOf(err)
	status.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
	if status.Code >= http.StatusInternalServerError && r.Context().Err() == nil {
		s.log.Error("serve request", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	if status.Details != nil && status.Details.RetryAfterSeconds > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(status.Details.RetryAfterSeconds)))
	}
	writeJSON(w, int(status.Code), status)
}

// WriteError answers with the Status of err, as every part of the API does: for
// handlers that are mounted.
func WriteError(w http.ResponseWriter, err error) {
	status := statusOf(err)
	status.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
	writeJSON(w, int(status.Code), status)
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		code, data = http.StatusInternalServerError, []byte(`{"apiVersion":"v1","kind":"Status","status":"Failure","code":500,"message":"encode answer"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(append(data, '\n')) // the client went away: nobody to tell
}
