function love.conf(t)
    t.identity = "awqua-npc"
    t.window.title = "Awqua"
    t.window.width, t.window.height = 640, 360
    t.window.vsync = 0
    t.modules.audio, t.modules.sound, t.modules.physics, t.modules.joystick = false, false, false, false
end
