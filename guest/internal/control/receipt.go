package control

import (
	"context"
	"encoding/hex"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/sealvol/sealvol/guest/api/receipt"
	sealvolv1 "github.com/sealvol/sealvol/guest/api/v1"
)

// Receipt implements sealvol.v1.Control.
func (s Service) Receipt(ctx context.Context, req *sealvolv1.ReceiptRequest) (*sealvolv1.ReceiptResponse, error) {
	resp, err := s.issue(ctx, req.Nonce)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return resp, nil
}

// issue makes the receipt, and has the TEE quote it when there is a nonce: without one a quote could be an old one.
func (s Service) issue(ctx context.Context, nonce []byte) (*sealvolv1.ReceiptResponse, error) {
	if len(nonce) > 0 {
		if err := receipt.CheckNonce(nonce); err != nil {
			return nil, err
		}
	}
	encoded, err := s.receipt(nonce).Encode()
	if err != nil {
		return nil, err
	}
	resp := &sealvolv1.ReceiptResponse{Receipt: encoded}
	if len(nonce) == 0 || s.TEE == nil {
		return resp, nil
	}
	if resp.Quote, err = s.TEE.Quote(ctx, receipt.ReportData(encoded)); err != nil {
		return nil, err
	}
	return resp, nil
}

func (s Service) receipt(nonce []byte) receipt.Receipt {
	// Volumes first: they are sealed when the policy cannot change any more, so the one that is read next is theirs.
	volumes := s.Volumes.Status()
	policy, warnings := s.Sandbox.Describe()
	r := receipt.Receipt{
		Version:  receipt.Version,
		Service:  s.Version,
		TEE:      s.tee(),
		Nonce:    hex.EncodeToString(nonce),
		Issued:   s.Now().UTC().Truncate(time.Second),
		Policy:   receipt.Policy{Source: policy.Source, Digest: policy.Digest, InForce: policy.InForce},
		Warnings: warnings,
	}
	if d := policy.InitData; d != nil {
		r.Policy.InitData = &receipt.InitData{Algorithm: d.Algorithm, Digest: d.Digest}
	}
	for _, c := range policy.Containers {
		r.Containers = append(r.Containers, receipt.Container{Name: c.Name, RootFS: c.Rootfs, ArgsPinned: c.ArgsPinned, State: c.State, ID: c.Id})
	}
	for _, v := range volumes {
		r.Volumes = append(r.Volumes, ofVolume(v))
	}
	return r
}

func ofVolume(v *sealvolv1.Volume) receipt.Volume {
	sealed := receipt.Volume{
		Name:      v.Name,
		State:     v.State,
		Layering:  v.Layering,
		Suite:     v.Suite,
		Driver:    v.CipherDriver,
		FSType:    v.FsType,
		SizeBytes: v.SizeBytes,
		PCIPath:   v.PciPath,
		Created:   utc(v.Created),
		Opened:    utc(v.Opened),
		FailedIO:  v.Faults.GetCount(),
		Error:     v.Error,
	}
	for _, m := range v.Mounts {
		sealed.Mounts = append(sealed.Mounts, receipt.Mount{Container: m.Container, Path: m.Path, ReadOnly: m.ReadOnly, Options: m.Options})
	}
	return sealed
}

// utc is a time of sealvol.v1, where 0 is none.
func utc(seconds int64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0).UTC()
}
