package apiserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// pingEvery keeps idle terminals open through NAT and finds clients that vanished.
const pingEvery = 30 * time.Second

// openSPDY upgrades to SPDY/3.1 and collects the streams that the client opens, one
// per direction: protocols channel.k8s.io to v4.channel.k8s.io.
func (s *Server) openSPDY(ctx context.Context, w http.ResponseWriter, r *http.Request, opts *corev1.PodExecOptions) (*session, error) {
	protocol, err := httpstream.Handshake(r, w, remotecommand.SupportedStreamingProtocols)
	if err != nil {
		return nil, err // the handshake has answered
	}
	streams := make(chan newStream, maxStreams)
	conn := spdy.NewResponseUpgraderWithPings(pingEvery).UpgradeResponse(w, r, func(st httpstream.Stream, replied <-chan struct{}) error {
		select { // the reply is sent when this function returns
		case streams <- newStream{st, replied}:
			return nil
		default:
			return fmt.Errorf("more than %d streams", maxStreams)
		}
	})
	if conn == nil {
		return nil, errors.New("upgrade to SPDY")
	}
	conn.SetIdleTimeout(s.cfg.Idle)
	byType, err := collectStreams(ctx, conn, streams, wantedStreams(protocol, opts))
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return spdySession(protocol, conn, byType), nil
}

// newStream is a stream that is usable once the client was told so.
type newStream struct {
	httpstream.Stream
	replied <-chan struct{}
}

// maxStreams is how many streams a client may have opened that were not looked at.
const maxStreams = 8

func wantedStreams(protocol string, opts *corev1.PodExecOptions) int {
	n := 1 // the error stream
	for _, wanted := range []bool{opts.Stdin, opts.Stdout, opts.Stderr, opts.TTY && resizable(protocol)} {
		if wanted {
			n++
		}
	}
	return n
}

func resizable(protocol string) bool {
	return protocol == remotecommand.StreamProtocolV3Name || protocol == remotecommand.StreamProtocolV4Name
}

func collectStreams(ctx context.Context, conn httpstream.Connection, streams <-chan newStream, want int) (map[string]httpstream.Stream, error) {
	timeout := time.NewTimer(remotecommand.DefaultStreamCreationTimeout)
	defer timeout.Stop()
	got := map[string]httpstream.Stream{}
	for len(got) < want {
		select {
		case st := <-streams:
			select {
			case <-st.replied:
				got[st.Headers().Get(corev1.StreamType)] = st.Stream
			case <-conn.CloseChan():
			}
		case <-timeout.C:
			return nil, fmt.Errorf("the client opened %d of %d streams", len(got), want)
		case <-conn.CloseChan():
			return nil, errors.New("the client closed the connection")
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if got[corev1.StreamTypeError] == nil {
		return nil, errors.New("the client opened no error stream")
	}
	return got, nil
}

func spdySession(protocol string, conn httpstream.Connection, streams map[string]httpstream.Stream) *session {
	closed := make(chan struct{})
	go func() {
		<-conn.CloseChan() // closed by finish at the latest
		close(closed)
	}()
	out := &session{closed: closed}
	if st := streams[corev1.StreamTypeStdin]; st != nil {
		out.stdin = st
	}
	if st := streams[corev1.StreamTypeStdout]; st != nil {
		out.stdout = st
	}
	if st := streams[corev1.StreamTypeStderr]; st != nil {
		out.stderr = st
	}
	if st := streams[corev1.StreamTypeResize]; st != nil {
		out.resize = st
	}
	out.finish = func(status *metav1.Status) {
		errorStream := streams[corev1.StreamTypeError]
		_, _ = errorStream.Write(lastMessage(protocol, status)) // the client may be gone
		for _, name := range []string{corev1.StreamTypeStdout, corev1.StreamTypeStderr, corev1.StreamTypeError} {
			if st := streams[name]; st != nil {
				_ = st.Close()
			}
		}
		// The client closes the connection when it has read everything; do not cut it
		// off, but do not wait for ever.
		select {
		case <-closed:
		case <-time.After(time.Second):
		}
		_ = conn.Close()
	}
	return out
}

// lastMessage is a Status since v4; before, it is a text, and nothing for success.
func lastMessage(protocol string, status *metav1.Status) []byte {
	if protocol == remotecommand.StreamProtocolV4Name || protocol == remotecommand.StreamProtocolV5Name {
		data, _ := json.Marshal(status) // a Status always encodes
		return data
	}
	if status.Status == metav1.StatusSuccess {
		return nil
	}
	return []byte(status.Message)
}

// openWebSocket upgrades to a WebSocket whose messages begin with a channel number:
// protocols v4.channel.k8s.io and v5.channel.k8s.io, which can close stdin.
func (s *Server) openWebSocket(_ context.Context, w http.ResponseWriter, r *http.Request, opts *corev1.PodExecOptions) (*session, error) {
	config := wsstream.ChannelProtocolConfig{Binary: true, Channels: execChannels(opts)}
	ws := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{
		remotecommand.StreamProtocolV4Name: config,
		remotecommand.StreamProtocolV5Name: config,
	})
	ws.SetIdleTimeout(s.cfg.Idle)
	// The library logs every broken connection as an error; it is none of ours.
	r = r.WithContext(klog.NewContext(r.Context(), logr.Discard()))
	protocol, channels, err := ws.Open(w, r)
	if err != nil {
		return nil, fmt.Errorf("upgrade to WebSocket: %w", err)
	}
	closed := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, channels[endChannel])
		close(closed)
	}()
	out := &session{closed: closed}
	if opts.Stdin {
		out.stdin = channels[remotecommand.StreamStdIn]
	}
	if opts.Stdout {
		out.stdout = channels[remotecommand.StreamStdOut]
	}
	if opts.Stderr {
		out.stderr = channels[remotecommand.StreamStdErr]
	}
	if opts.TTY {
		out.resize = channels[remotecommand.StreamResize]
	}
	out.finish = func(status *metav1.Status) {
		_, _ = channels[remotecommand.StreamErr].Write(lastMessage(protocol, status)) // the client may be gone
		_ = ws.Close()
	}
	return out, nil
}

// endChannel is a channel that no client writes to: it ends with the connection.
const endChannel = remotecommand.StreamResize + 1

// execChannels returns the direction of every channel. What the client may send but
// did not announce is ignored, or it would block the channels behind it.
func execChannels(opts *corev1.PodExecOptions) []wsstream.ChannelType {
	types := []wsstream.ChannelType{
		remotecommand.StreamStdIn:  wsstream.IgnoreChannel,
		remotecommand.StreamStdOut: wsstream.WriteChannel,
		remotecommand.StreamStdErr: wsstream.WriteChannel,
		remotecommand.StreamErr:    wsstream.WriteChannel,
		remotecommand.StreamResize: wsstream.IgnoreChannel,
		endChannel:                 wsstream.ReadChannel,
	}
	if opts.Stdin {
		types[remotecommand.StreamStdIn] = wsstream.ReadChannel
	}
	if opts.TTY {
		types[remotecommand.StreamResize] = wsstream.ReadChannel
	}
	return types
}
