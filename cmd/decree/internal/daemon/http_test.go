package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/raftstore/apiserver"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/peer"
	"decree.dev/decree/raftstore/pki"
	"decree.dev/decree/raftstore/seal"
)

// TestInWords has the errors that operators meet: who asks again may have more luck
// with those of 5xx only.
func TestInWords(t *testing.T) {
	tests := []struct {
		err  error
		want int
	}{
		{errors.New("role \"x\": expected server or agent"), http.StatusBadRequest},
		{&peer.RemoteError{Text: "no server is called x"}, http.StatusBadRequest},
		{&command.Rejection{Code: command.Exists}, http.StatusConflict},
		{errNoState, http.StatusServiceUnavailable},
		{raftstore.ErrNotLeader, http.StatusServiceUnavailable},
		{raftstore.ErrLeadershipLost, http.StatusServiceUnavailable},
		{raftstore.ErrClosed, http.StatusServiceUnavailable},
		{raftstore.ErrFatal, http.StatusInternalServerError},
		{seal.ErrNoSpace, http.StatusInternalServerError},
		{context.DeadlineExceeded, http.StatusGatewayTimeout},
	}
	for _, tt := range tests {
		rec := httptest.NewRecorder()
		apiserver.WriteError(rec, inWords(fmt.Errorf("make token: %w", tt.err)))
		if rec.Code != tt.want {
			t.Errorf("%v: %d %s", tt.err, rec.Code, rec.Body)
		}
	}
}

// TestOnlyAdministrators: what acts on the cluster, or looks into its machines, is for
// administrators; a node may not have others probed.
func TestOnlyAdministrators(t *testing.T) {
	s := &server{cfg: &Config{}}
	for _, path := range []string{"netcheck", "tokens", "lead", "ca", "keys"} {
		who := apiserver.Identity{Name: pki.NodePrefix + "n1", Groups: []string{pki.GroupNodes}}
		r := httptest.NewRequest(http.MethodPost, clusterPath+path, nil)
		rec := httptest.NewRecorder()
		s.clusterHandler().ServeHTTP(rec, r.WithContext(apiserver.WithIdentity(r.Context(), who)))
		if rec.Code != http.StatusForbidden {
			t.Errorf("%s: %d %s", path, rec.Code, rec.Body)
		}
	}
}
