package volume

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/sys/mountinfo"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/reconciler/agent/podenv"
	"decree.dev/decree/schemas/api"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test mounts and must run as root (run: sudo go test ./reconciler/agent/volume)")
	}
}

// podWith returns a pod's volumes, which are removed at the end of the test.
func podWith(t *testing.T, objects []api.Object, volumes ...corev1.Volume) *Pod {
	t.Helper()
	needRoot(t)
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", Labels: map[string]string{"app": "web"}}}
	pod.Spec.Volumes = volumes
	p := &Pod{Dir: filepath.Join(t.TempDir(), "pod"), Mounter: Kernel{}, Env: podenv.Input{Pod: pod, Container: &corev1.Container{}, Objects: api.NewSnapshot(1, objects...)}}
	t.Cleanup(func() {
		if err := Remove(Kernel{}, p.Dir); err != nil {
			t.Error(err)
		}
		if left, _ := mountinfo.GetMounts(mountinfo.PrefixFilter(p.Dir)); len(left) != 0 {
			t.Errorf("still mounted: %v", left)
		}
	})
	return p
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	}
	return string(data)
}

func settings(data map[string]string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "settings"}, Data: data}
}

func TestConfigMapChangesAtOnce(t *testing.T) {
	v := corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}}}}
	p := podWith(t, []api.Object{settings(map[string]string{"a": "1", "b": "2"})}, v)
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(p.Dir, "volumes", "v")
	first, err := os.Readlink(filepath.Join(dir, "..data"))
	if err != nil || read(t, filepath.Join(dir, "a")) != "1" {
		t.Fatal(err)
	}
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	if again, _ := os.Readlink(filepath.Join(dir, "..data")); again != first {
		t.Error("the same content was written again")
	}
	p.Env.Objects = api.NewSnapshot(2, settings(map[string]string{"a": "one", "c": "3"}))
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	if read(t, filepath.Join(dir, "a")) != "one" || read(t, filepath.Join(dir, "c")) != "3" {
		t.Error("the new content is not there")
	}
	if _, err := os.Lstat(filepath.Join(dir, "b")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("b is still there: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, first)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the old version is still there: %v", err)
	}
}

func TestSecretInMemoryWithItemsAndModes(t *testing.T) {
	mode, own, gid := int32(0o400), int32(0o440), int64(4321)
	v := corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "keys", DefaultMode: &mode,
		Items: []corev1.KeyToPath{{Key: "tls", Path: "certs/tls.crt"}, {Key: "token", Path: "token", Mode: &own}}}}}
	p := podWith(t, []api.Object{&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "keys"},
		Data: map[string][]byte{"tls": []byte("C"), "token": []byte("T"), "other": []byte("X")}}}, v)
	p.Env.Pod.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: &gid}
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(p.Dir, "volumes", "v")
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil || st.Type != 0x01021994 {
		t.Errorf("%s is not a tmpfs: %x, %v", dir, st.Type, err)
	}
	info, err := os.Stat(filepath.Join(dir, "certs", "tls.crt"))
	if err != nil || info.Mode().Perm() != 0o440 || info.Sys().(*syscall.Stat_t).Gid != 4321 {
		t.Errorf("certs/tls.crt: %v, %v", info, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "other")); err == nil {
		t.Error("a key that is no item is there")
	}
}

func TestMissingObjects(t *testing.T) {
	yes := true
	named := func(optional *bool, items ...corev1.KeyToPath) corev1.Volume {
		return corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: "settings"}, Optional: optional, Items: items}}}
	}
	p := podWith(t, nil, named(nil))
	_, missing := errors.AsType[*podenv.MissingError](p.Sync())
	if err := p.Sync(); !missing || !strings.Contains(err.Error(), `volume "v": configmap "settings" not found`) {
		t.Errorf("error %v", err)
	}
	p = podWith(t, nil, named(&yes))
	if err := p.Sync(); err != nil {
		t.Error(err)
	}
	p = podWith(t, []api.Object{settings(map[string]string{"a": "1"})}, named(nil, corev1.KeyToPath{Key: "b", Path: "b"}))
	if err := p.Sync(); err == nil || !strings.Contains(err.Error(), `has no key "b"`) {
		t.Errorf("error %v", err)
	}
	p = podWith(t, []api.Object{settings(map[string]string{"a": "1"})}, named(nil, corev1.KeyToPath{Key: "a", Path: "../../etc/x"}))
	if err := p.Sync(); err == nil || !strings.Contains(err.Error(), "..") {
		t.Errorf("a path that leaves the volume: %v", err)
	}
}

func TestEmptyDir(t *testing.T) {
	size, gid := resource.MustParse("1Mi"), int64(777)
	p := podWith(t, nil,
		corev1.Volume{Name: "mem", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory, SizeLimit: &size}}},
		corev1.Volume{Name: "disk", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}})
	p.Env.Pod.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: &gid}
	for range 2 {
		if err := p.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	mem := filepath.Join(p.Dir, "volumes", "mem", "big")
	if err := os.WriteFile(mem, make([]byte, 2<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("2 MiB in a volume of 1 MiB: %v", err)
	}
	info, err := os.Stat(filepath.Join(p.Dir, "volumes", "disk"))
	if err != nil || info.Mode()&fs.ModeSetgid == 0 || info.Sys().(*syscall.Stat_t).Gid != 777 {
		t.Errorf("disk: %v, %v", info, err)
	}
}

func TestSubPathCannotEscape(t *testing.T) {
	p := podWith(t, nil, corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}})
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(p.Dir, "volumes", "v")
	target := filepath.Join(p.Dir, "subpaths", "c", "0")
	got, err := SubPath(Kernel{}, root, "deep/down", target)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(got, "x"), []byte("1"), 0o600); err != nil || read(t, filepath.Join(root, "deep/down/x")) != "1" {
		t.Errorf("not the same folder: %v", err)
	}
	if err := os.Symlink("/etc", filepath.Join(root, "evil")); err != nil {
		t.Fatal(err)
	}
	for _, sub := range []string{"evil", "evil/passwd", "../v2", "/etc", "deep/../../.."} {
		if got, err := SubPath(Kernel{}, root, sub, target+"x"); err == nil {
			t.Errorf("subPath %q gave %s", sub, got)
		}
	}
}

func TestDownwardAPI(t *testing.T) {
	p := podWith(t, nil, corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{
		Items: []corev1.DownwardAPIVolumeFile{{Path: "labels", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.labels"}}}}}})
	before := Version(p.Env.Pod, p.Env.Objects)
	if err := p.Sync(); err != nil {
		t.Fatal(err)
	}
	if got := read(t, filepath.Join(p.Dir, "volumes", "v", "labels")); got != `app="web"` {
		t.Errorf("labels: %q", got)
	}
	p.Env.Pod.Labels["tier"] = "front"
	if Version(p.Env.Pod, p.Env.Objects) == before {
		t.Error("new labels do not change the version")
	}
}

func TestResolvConf(t *testing.T) {
	dns := DNS{Server: netip.MustParseAddr("10.97.0.10"), Domain: "cluster.local"}
	node := []byte("nameserver 192.0.2.53\nsearch example.org\noptions timeout:1\n")
	three := "3"
	for _, test := range []struct {
		name string
		edit func(*corev1.PodSpec)
		want string
	}{
		{"cluster first", func(*corev1.PodSpec) {}, "search shop.svc.cluster.local svc.cluster.local cluster.local example.org\nnameserver 10.97.0.10\noptions ndots:5\n"},
		{"host network", func(s *corev1.PodSpec) { s.HostNetwork = true }, "search example.org\nnameserver 192.0.2.53\noptions timeout:1\n"},
		{"default", func(s *corev1.PodSpec) { s.DNSPolicy = corev1.DNSDefault }, "search example.org\nnameserver 192.0.2.53\noptions timeout:1\n"},
		{"none with config", func(s *corev1.PodSpec) {
			s.DNSPolicy = corev1.DNSNone
			s.DNSConfig = &corev1.PodDNSConfig{Nameservers: []string{"192.0.2.1"}, Searches: []string{"a.example"}, Options: []corev1.PodDNSConfigOption{{Name: "ndots", Value: &three}}}
		}, "search a.example\nnameserver 192.0.2.1\noptions ndots:3\n"},
		{"config wins over ours", func(s *corev1.PodSpec) {
			s.DNSConfig = &corev1.PodDNSConfig{Options: []corev1.PodDNSConfigOption{{Name: "ndots", Value: &three}, {Name: "edns0"}}}
		}, "search shop.svc.cluster.local svc.cluster.local cluster.local example.org\nnameserver 10.97.0.10\noptions ndots:3 edns0\n"},
	} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop"}}
		test.edit(&pod.Spec)
		if got := string(ResolvConf(pod, dns, node)); got != test.want {
			t.Errorf("%s:\n got %q\nwant %q", test.name, got, test.want)
		}
	}
}

func TestHosts(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop"}}
	pod.Spec.Subdomain = "db"
	pod.Spec.HostAliases = []corev1.HostAlias{{IP: "192.0.2.9", Hostnames: []string{"x", "y"}}}
	got := string(Hosts(pod, "db-0", "cluster.local", []string{"10.98.0.5"}))
	for _, want := range []string{"127.0.0.1\tlocalhost\n", "10.98.0.5\tdb-0.db.shop.svc.cluster.local\tdb-0\n", "192.0.2.9\tx\ty\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("hosts lacks %q:\n%s", want, got)
		}
	}
}
