package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
)

// asynqSystem is asynq on a Redis server of its own. An asynq server takes one job
// at a time from the queue, so that several servers are faster.
func asynqSystem(servers int) system {
	s := system{
		name: "asynq on Redis",
		tuning: "a redis-server of its own in each round, with appendfsync=always for FULL and everysec for NORMAL; one server, " +
			"Concurrency 64, TaskCheckInterval 1 ms; done jobs are retained (Retention); completion seen by asking the Inspector every 0.1 ms",
		batch: 1,
		open:  func(e env) (session, error) { return openAsynq(e, servers) },
	}
	if servers > 1 {
		s.name = fmt.Sprintf("asynq on Redis, %d servers", servers)
		s.tuning = fmt.Sprintf("as asynq on Redis, but %d servers in the process", servers)
	}
	if _, err := exec.LookPath("redis-server"); err != nil {
		s.skip = "redis-server is not installed"
	}
	return s
}

type asynqSession struct {
	env
	process   *exec.Cmd
	redis     *redis.Client
	client    *asynq.Client
	inspector *asynq.Inspector
	servers   []*asynq.Server
}

func openAsynq(e env, servers int) (session, error) {
	s := &asynqSession{env: e}
	addr, err := s.startRedis()
	if err != nil {
		return nil, err
	}
	opt := asynq.RedisClientOpt{Addr: addr, PoolSize: 100}
	s.client = asynq.NewClient(opt)
	s.inspector = asynq.NewInspector(opt)
	handler := asynq.HandlerFunc(func(context.Context, *asynq.Task) error {
		e.jobs.run()
		return nil
	})
	for range servers {
		server := asynq.NewServer(opt, asynq.Config{
			Concurrency:       64,
			TaskCheckInterval: time.Millisecond,
			LogLevel:          asynq.ErrorLevel,
		})
		if err := server.Start(handler); err != nil {
			return nil, errors.Join(err, s.close())
		}
		s.servers = append(s.servers, server)
	}
	return s, nil
}

// startRedis starts a redis-server and waits until it answers.
func (s *asynqSession) startRedis() (addr string, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	fsync := map[string]string{"FULL": "always", "NORMAL": "everysec"}[s.sync]
	s.process = exec.Command("redis-server", "--bind", "127.0.0.1", "--port", strconv.Itoa(port), "--dir", s.dir,
		"--save", "", "--appendonly", "yes", "--appendfsync", fsync, "--daemonize", "no", "--loglevel", "warning")
	s.process.Stderr = os.Stderr
	if err := s.process.Start(); err != nil {
		return "", err
	}
	addr = fmt.Sprintf("127.0.0.1:%d", port)
	s.redis = redis.NewClient(&redis.Options{Addr: addr})
	return addr, poll(5*time.Millisecond, func() (bool, error) { return s.redis.Ping(context.Background()).Err() == nil, nil })
}

func (s *asynqSession) submit(int) (string, error) {
	info, err := s.client.Enqueue(asynq.NewTask("job", nil), asynq.Retention(time.Hour))
	if err != nil {
		return "", err
	}
	return info.ID, nil
}

func (s *asynqSession) wait(id string) error {
	return poll(100*time.Microsecond, func() (bool, error) {
		info, err := s.inspector.GetTaskInfo("default", id)
		if err != nil {
			return false, err
		}
		return info.State == asynq.TaskStateCompleted, nil
	})
}

func (s *asynqSession) drain(n int) error { return s.drainByCount(n, s.finals) }

// finals counts the members of the sorted set in which asynq stores done jobs.
func (s *asynqSession) finals() (int, error) {
	n, err := s.redis.ZCard(context.Background(), "asynq:{default}:completed").Result()
	return int(n), err
}

func (s *asynqSession) settings() (string, error) {
	var settings string
	for _, name := range []string{"appendonly", "appendfsync"} {
		got, err := s.redis.ConfigGet(context.Background(), name).Result()
		if err != nil {
			return "", err
		}
		settings += ", " + name + " " + got[name]
	}
	return settings[2:], nil
}

func (s *asynqSession) close() error {
	var all sync.WaitGroup
	for _, server := range s.servers {
		all.Go(server.Shutdown)
	}
	all.Wait()
	err := errors.Join(s.client.Close(), s.inspector.Close(), s.redis.Close(), s.process.Process.Kill())
	s.process.Wait() // returns that it was killed
	return err
}
