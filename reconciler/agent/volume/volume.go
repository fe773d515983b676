package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/reconciler/agent/podenv"
	"decree.dev/decree/schemas/api"
)

// Pod makes the volumes of one pod below Dir.
type Pod struct {
	Dir     string // of this pod alone
	Mounter Mounter
	// Env is the input of downward API files; its Pod, Objects and addresses count
	// for all volumes.
	Env podenv.Input
}

// Version identifies the content that the pod's volumes should have: it changes
// when an object that they show changes.
func Version(pod *corev1.Pod, objects api.Reader) string {
	var b strings.Builder
	b.WriteString("v")
	add := func(o api.Object, ok bool) {
		if ok {
			b.WriteString("/" + o.GetResourceVersion())
		} else {
			b.WriteString("/-")
		}
	}
	each := func(cm, secret string, downward bool) {
		switch {
		case cm != "":
			o, ok := objects.Get(api.Key{Resource: api.ConfigMaps, Namespace: pod.Namespace, Name: cm})
			add(o, ok)
		case secret != "":
			o, ok := objects.Get(api.Key{Resource: api.Secrets, Namespace: pod.Namespace, Name: secret})
			add(o, ok)
		case downward:
			fmt.Fprintf(&b, "/%v%v", pod.Labels, pod.Annotations) // fmt prints maps in key order
		}
	}
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		b.WriteString("/" + v.Name)
		switch {
		case v.ConfigMap != nil:
			each(v.ConfigMap.Name, "", false)
		case v.Secret != nil:
			each("", v.Secret.SecretName, false)
		case v.DownwardAPI != nil:
			each("", "", true)
		case v.Projected != nil:
			for _, s := range v.Projected.Sources {
				switch {
				case s.ConfigMap != nil:
					each(s.ConfigMap.Name, "", false)
				case s.Secret != nil:
					each("", s.Secret.Name, false)
				case s.DownwardAPI != nil:
					each("", "", true)
				}
			}
		}
	}
	return b.String()
}

// Sync makes all volumes exist with their wanted content. It is idempotent. It
// returns an error matching *podenv.MissingError when an object is not there.
func (p *Pod) Sync() error {
	for i := range p.Env.Pod.Spec.Volumes {
		v := &p.Env.Pod.Spec.Volumes[i]
		if err := p.one(v); err != nil {
			return fmt.Errorf("volume %q: %w", v.Name, err)
		}
	}
	return nil
}

// Path is where the volume named name lies on the node.
func (p *Pod) Path(name string) (string, error) {
	for i := range p.Env.Pod.Spec.Volumes {
		v := &p.Env.Pod.Spec.Volumes[i]
		if v.Name != name {
			continue
		}
		if v.HostPath != nil {
			return v.HostPath.Path, nil
		}
		return filepath.Join(p.Dir, "volumes", name), nil
	}
	return "", fmt.Errorf("the pod has no volume %q", name)
}

func (p *Pod) one(v *corev1.Volume) error {
	if v.HostPath != nil {
		return hostPath(v.HostPath)
	}
	dir := filepath.Join(p.Dir, "volumes", v.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	switch {
	case v.EmptyDir != nil:
		return p.emptyDir(dir, v.EmptyDir)
	case v.ConfigMap != nil:
		return p.write(dir, v.ConfigMap.DefaultMode, false, func(add adder) error {
			return p.configMap(v.ConfigMap.Name, v.ConfigMap.Items, v.ConfigMap.Optional, add)
		})
	case v.Secret != nil:
		return p.write(dir, v.Secret.DefaultMode, true, func(add adder) error {
			return p.secret(v.Secret.SecretName, v.Secret.Items, v.Secret.Optional, add)
		})
	case v.DownwardAPI != nil:
		return p.write(dir, v.DownwardAPI.DefaultMode, false, func(add adder) error {
			return p.downward(v.DownwardAPI.Items, add)
		})
	case v.Projected != nil:
		return p.write(dir, v.Projected.DefaultMode, true, func(add adder) error {
			return p.projected(v.Projected.Sources, add)
		})
	}
	return errors.New("this kind of volume is not supported; use emptyDir, configMap, secret, downwardAPI, projected or hostPath")
}

func (p *Pod) emptyDir(dir string, e *corev1.EmptyDirVolumeSource) error {
	if e.Medium == corev1.StorageMediumMemory {
		var size int64
		if e.SizeLimit != nil {
			size = e.SizeLimit.Value()
		}
		if err := p.Mounter.Tmpfs(dir, size); err != nil {
			return err
		}
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		return err
	}
	gid := p.fsGroup()
	if gid < 0 {
		return nil
	}
	if policy := p.Env.Pod.Spec.SecurityContext.FSGroupChangePolicy; policy != nil && *policy == corev1.FSGroupChangeOnRootMismatch && owns(dir, gid) {
		return nil
	}
	return chownTree(dir, gid)
}

// fsGroup is the group that owns the pod's volumes, -1 for none.
func (p *Pod) fsGroup() int {
	sc := p.Env.Pod.Spec.SecurityContext
	if sc == nil || sc.FSGroup == nil {
		return -1
	}
	return int(*sc.FSGroup)
}

// adder takes one file; mode nil takes the volume's default.
type adder func(path string, data []byte, mode *int32)

const defaultMode = 0o644

// write collects the files of a volume and writes them at once.
func (p *Pod) write(dir string, mode *int32, memory bool, collect func(adder) error) error {
	files, gid := map[string]File{}, p.fsGroup()
	err := collect(func(path string, data []byte, m *int32) {
		f := File{Data: data, Mode: defaultMode}
		switch {
		case m != nil:
			f.Mode = fs.FileMode(*m).Perm()
		case mode != nil:
			f.Mode = fs.FileMode(*mode).Perm()
		}
		if gid >= 0 {
			f.Mode |= 0o440
		}
		files[path] = f
	})
	if err != nil {
		return err
	}
	if memory {
		if err := p.Mounter.Tmpfs(dir, 0); err != nil {
			return err
		}
	}
	_, err = WriteAtomic(dir, files, gid)
	return err
}

func (p *Pod) configMap(name string, items []corev1.KeyToPath, opt *bool, add adder) error {
	cm, ok := api.Get[*corev1.ConfigMap](p.Env.Objects, p.Env.Pod.Namespace, name)
	if !ok {
		return absent(opt, fmt.Sprintf("configmap %q not found in namespace %q", name, p.Env.Pod.Namespace))
	}
	data := make(map[string][]byte, len(cm.Data)+len(cm.BinaryData))
	for k, v := range cm.Data {
		data[k] = []byte(v)
	}
	for k, v := range cm.BinaryData {
		data[k] = v
	}
	return addKeys(fmt.Sprintf("configmap %q in namespace %q", name, cm.Namespace), data, items, opt, add)
}

func (p *Pod) secret(name string, items []corev1.KeyToPath, opt *bool, add adder) error {
	s, ok := api.Get[*corev1.Secret](p.Env.Objects, p.Env.Pod.Namespace, name)
	if !ok {
		return absent(opt, fmt.Sprintf("secret %q not found in namespace %q", name, p.Env.Pod.Namespace))
	}
	return addKeys(fmt.Sprintf("secret %q in namespace %q", name, s.Namespace), podenv.SecretData(s), items, opt, add)
}

func absent(opt *bool, what string) error {
	if opt != nil && *opt {
		return nil
	}
	return &podenv.MissingError{What: what}
}

func addKeys(what string, data map[string][]byte, items []corev1.KeyToPath, opt *bool, add adder) error {
	if items == nil {
		for k, v := range data {
			add(k, v, nil)
		}
		return nil
	}
	for _, item := range items {
		v, ok := data[item.Key]
		if !ok {
			if err := absent(opt, what+" has no key "+strconv.Quote(item.Key)); err != nil {
				return err
			}
			continue
		}
		add(item.Path, v, item.Mode)
	}
	return nil
}

func (p *Pod) downward(items []corev1.DownwardAPIVolumeFile, add adder) error {
	for _, item := range items {
		var value string
		var err error
		switch {
		case item.FieldRef != nil:
			value, err = podenv.Field(p.Env, item.FieldRef.FieldPath)
		case item.ResourceFieldRef != nil:
			value, err = podenv.Resource(p.Env, item.ResourceFieldRef)
		}
		if err != nil {
			return fmt.Errorf("file %q: %w", item.Path, err)
		}
		add(item.Path, []byte(value), item.Mode)
	}
	return nil
}

func (p *Pod) projected(sources []corev1.VolumeProjection, add adder) error {
	for _, s := range sources {
		var err error
		switch {
		case s.ConfigMap != nil:
			err = p.configMap(s.ConfigMap.Name, s.ConfigMap.Items, s.ConfigMap.Optional, add)
		case s.Secret != nil:
			err = p.secret(s.Secret.Name, s.Secret.Items, s.Secret.Optional, add)
		case s.DownwardAPI != nil:
			err = p.downward(s.DownwardAPI.Items, add)
		default:
			err = errors.New("this projected source is not supported; use configMap, secret or downwardAPI")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// hostPath checks or makes what a hostPath volume names.
func hostPath(h *corev1.HostPathVolumeSource) error {
	kind := corev1.HostPathUnset
	if h.Type != nil {
		kind = *h.Type
	}
	switch kind {
	case corev1.HostPathUnset:
		return nil
	case corev1.HostPathDirectoryOrCreate:
		return os.MkdirAll(h.Path, 0o755)
	case corev1.HostPathFileOrCreate:
		f, err := os.OpenFile(h.Path, os.O_CREATE|os.O_RDONLY, 0o644)
		if err != nil {
			return err
		}
		return f.Close()
	}
	info, err := os.Stat(h.Path)
	if err != nil {
		return fmt.Errorf("hostPath of type %s: %w", kind, err)
	}
	fits := map[corev1.HostPathType]bool{
		corev1.HostPathDirectory: info.IsDir(),
		corev1.HostPathFile:      info.Mode().IsRegular(),
		corev1.HostPathSocket:    info.Mode()&fs.ModeSocket != 0,
		corev1.HostPathCharDev:   info.Mode()&fs.ModeCharDevice != 0,
		corev1.HostPathBlockDev:  info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0,
	}
	if !fits[kind] {
		return fmt.Errorf("hostPath %s is not a %s", h.Path, kind)
	}
	return nil
}

// Names lists the volumes that the container mounts, for error messages.
func Names(c *corev1.Container) []string {
	var names []string
	for _, m := range c.VolumeMounts {
		if !slices.Contains(names, m.Name) {
			names = append(names, m.Name)
		}
	}
	return names
}
